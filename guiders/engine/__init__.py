"""The machinery that evaluates and combines predictions. No method is named here."""

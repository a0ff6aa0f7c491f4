"""What fits, searches and trainings share."""

"""What happens while sampling: plans of rules, the engine that runs them, and one file per method."""

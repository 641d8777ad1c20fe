"""What a run leaves: its folder, its journal, and the process that feeds MLflow."""

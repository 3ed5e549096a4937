"""What is distilled and how it is judged: one folder a task."""

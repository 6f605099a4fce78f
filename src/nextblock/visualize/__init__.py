"""Pictures: what a model predicts, finds odd, sees and attends to, and how evaluations went."""

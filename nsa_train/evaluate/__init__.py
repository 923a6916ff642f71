"""What a trained model can do with a long context: recall of planted facts, and held-out loss at other lengths."""

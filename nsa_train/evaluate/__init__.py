"""What a trained model can do with a long context: planted facts, loss at other lengths, blocks it selects."""

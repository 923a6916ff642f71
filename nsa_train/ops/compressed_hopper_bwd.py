def backward(): pass

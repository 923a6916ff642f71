"""What a configuration will cost, before anything starts: parameters, FLOPs and memory, by part."""

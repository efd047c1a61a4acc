"""What a checkpoint can do: load it in one process, whatever layout wrote it, and let it speak."""

"""What a batch is asked for: a file for each task, `denoise` the default."""

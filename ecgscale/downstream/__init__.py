"""From a pretrained encoder to downstream numbers: tasks, fine-tuning, metrics."""

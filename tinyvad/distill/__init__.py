"""Training of our own small backbones by distillation; nothing here is needed to build or run a detector."""

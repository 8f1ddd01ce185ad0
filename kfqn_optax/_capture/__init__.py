"""From a model and a batch to the loss, its gradient and the statistics of each layer."""

"""Int8 quantizers of weights and activations, in training (QAT) and after it (PTQ), by NNCF's placement."""

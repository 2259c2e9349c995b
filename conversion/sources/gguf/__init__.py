"""A .gguf file as a dense model: Transformers loads it, and all that the file says is accounted for.

Transformers makes a config and weights of such a file, and passes over what it does not know. Here each of the
architecture's keys is one that the config says too, or is brought into it (config.py, rope.py), or is refused by name;
each tensor is one of the model's, or refused (tensors.py). The tensors are also read without Transformers' loader: that
is what `verify` holds the loaded ones against.

(The package `gguf` is an extra, and imported where it is needed: whoever converts no such file has none.)
"""

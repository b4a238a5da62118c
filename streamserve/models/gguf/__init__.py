"""GGUF, llama.cpp's checkpoints: one file with config, tokenizer, template and packed weights.

`container` reads the header, `kinds` unpack the blocks of weights, `architectures` say what a file
holds in the words of our families, `tensors` and `source` bring the weights to the loader,
`vocabulary` and `pre_tokenizers` make a tokenizer of the metadata, `config` brings it all together.

The reader is our own, of the standard library and torch: the `gguf` package makes a numpy array of
every metadata value, which takes seconds for a vocabulary, and would be one more dependency. It is
what the tests write files with and compare to.
"""

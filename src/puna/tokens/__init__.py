"""From text to batches: BPE training, the tokenizer, token shards, packing and the loader.

Read in this order: ``tokenizer`` (text <-> ids, chat), ``train`` and ``encode`` (the two stages),
``shards`` (what encode writes), ``packing`` and ``mixing`` (which token stands in which row),
``loader`` (the batch of a step, as a pure function of the step).

Nothing here imports torch.
"""

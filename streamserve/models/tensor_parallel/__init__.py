"""A model over several devices, each of which holds its share of every layer (Megatron's split).

`share` says which rows and columns of which weight are whose, `source` reads no more than those,
`decoder` computes with them and adds up what the shares have found.
"""

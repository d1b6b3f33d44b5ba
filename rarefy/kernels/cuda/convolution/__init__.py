"""Convolutions, sums and pooling on int8 codes for CUDA; operators of ``rarefy.kernels`` say what each has to yield."""

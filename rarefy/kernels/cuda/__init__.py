"""Kernels for CUDA, one operator a file, in Triton or through cuDNN, both imported where one of these files is.

Nothing of this is imported with rarefy. Codes are int8 here whatever a graph keeps them in, and pictures lie with their
channels last (NHWC). The operators of ``rarefy.kernels`` in torch say what each has to yield; tests hold them to it on
a CPU through Triton's interpreter, and on a GPU where there is one.
"""

"""An ONNX file as a model: read, checked, and run by one table of operators that ``capture`` can trace."""

"""Words that a report uses, explained: shown where the mouse rests, and at the page's end."""

OF_CLASSES = ("accuracy", "drop", "agreement", "calibration error", "worst class")  # words for classifiers alone
GLOSSARY = {
    "accuracy": (
        "The share of validation images whose most likely class is the right one (top-1); top-5: the right one is "
        "among the five most likely."
    ),
    "interval": (
        "The range that holds the true value with 95 % confidence, given how many images were tried (Wilson). "
        "Differences inside it may be chance."
    ),
    "drop": (
        "How much accuracy was lost, counted on the same images through both models (paired), in points: from 93.4 % "
        "to 92.9 % is 0.5 points."
    ),
    "agreement": "The share of images on which both models give the same most likely class, right or wrong.",
    "calibration error": (
        "How far the model's confidence is from its accuracy, on average (ECE, 15 bins): 0 is perfect."
    ),
    "worst class": "The class with the lowest accuracy: a good mean can hide a class that was lost.",
    "latency": (
        "Time for one run of the model on the named runtime: the median of runs in which both models take turns."
    ),
    "size": "Bytes of the weights on disk.",
    "weights in memory": "Bytes of the model's numbers once it is loaded.",
    "weights read a run": "Bytes of the runtime's file, its weights as its kernels read them, which each run reads.",
    "parameters": "How many numbers the model has learned.",
    "MACs": "Multiplications with additions for one image: the work to do, though not always the time it takes.",
    "peak memory": "The most memory one run takes.",
    "pruning": "Removing whole channels that matter least; the model becomes narrower and needs no special hardware.",
    "distillation": "Training the small model to answer like the original.",
    "quantization": "Storing and multiplying 8-bit integers instead of 32-bit floats.",
    "clustering": ("Weights of a layer share few values, which training learns: smaller on disk, as fast as before."),
    "bits": "Bits that store one weight of the layer: 32 is float, 8 is int8.",
    "error": (
        "What rounding to few bits changed in the layer's weights: signal-to-noise in decibels, more is better; 30 "
        "dB is an error of 0.1 % of the power."
    ),
    "output": (
        "How much of a layer's output is noise, from its own rounding and from all before it: signal-to-noise in "
        "decibels against the float model."
    ),
    "parity": "Whether the file that is deployed answers like the model that was tested.",
    "gate": "After each step the model is measured again; a step that does not pay for what it costs is undone.",
    "robustness": (
        "Accuracy on images that were made worse on purpose (noise, blur, weather, compression), at rising strengths."
    ),
    "frontier": (
        "All candidates that were found: none of those shown as best is both slower and less accurate than another."
    ),
}

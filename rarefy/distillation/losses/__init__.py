"""Distillation losses: what the student is to copy of its teacher. One loss a file; the file name is its name.

A loss is a frozen dataclass, its fields its options. It is called once a step, in float32, on both networks' view of
the same pictures, and returns a scalar, the mean over the batch. Losses are summed as text, ``"lskd + 50*mse"``, or as
``[(1, Lskd()), (50, Mse())]``.

``on`` says what it looks at beside the logits:

* ``"logits"``: nothing, ``features`` is empty;
* ``"stages"``: the last value of each resolution that all of the network's work passes through, student's and teacher's
  matched by resolution; in a network of one resolution (ViT), four of them at equal depths;
* ``"embedding"``: what goes into the classifier;
* ``"neck"``: of a detector what goes into its heads, resolution by resolution; of other networks as ``"stages"``;
* ``"answers"``: what the task says of the answers, place by place: ``scores``, ``boxes``, ``distances``
  (``_places.py``), which are ``features`` then;
* ``"cross"``: the same of the teacher's answers and those of the rest of the teacher's heads, given the student's
  features in the middle of them;
* ``"relu_3=relu_5;layer3=layer3"``: pairs ``student=teacher`` of node names or dotted module names (a module's last
  node).

``features`` maps the student's node name to (student's value, teacher's value), both (N, channels, ...), whatever the
network's own layout is. A loss that looks at features also has ``adapter``, which may return a module that is trained
along and thrown away afterwards.
"""

from __future__ import annotations

"""Students: a network to train, made from its teacher. One kind a file, whose name is what ``distill`` takes for one.

A kind is a frozen dataclass, its fields its options, with one method (``rarefy.distillation.options.Student``):

    make(teacher, task, seed) -> the student, a new graph whose inputs and outputs have the teacher's shapes

``rarefy.distillation.teachers.student_of`` calls it, and leaves a record of what was asked, and of MACs and parameters
before and after. A word that names no file here is the source of another model (``"timm:resnet18"``, ``"small/"``, see
rarefy/models/load.py).
"""

"""Tasks with answers: SuperGLUE and the paper's other fine-tuning tasks.

What the paper fine-tunes on (sections 4 and 6), as text to text: reading what
the tasks' authors publish, T5's formats, and the way back from text to an
answer, its metrics, and submission files. Needs TensorFlow only to read tfds
datasets and to feed training.
"""

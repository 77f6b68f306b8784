"""Tasks with answers: text to text (paper, sections 4 and 6).

Reads the files that the tasks' authors publish and makes T5's texts of them,
without TensorFlow; or the same rows from tfds, with it.
"""

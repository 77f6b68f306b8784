"""`st_moe bench`: the sparse layer, the whole step, and other implementations.

commands.py is the door. sizes.py says what is timed, forms.py makes the
programs and proves them equal, timing.py runs them in turns, results.py and
pictures.py show what came out. Nothing here needs TensorFlow.
"""

"""ST-MoE: stable and transferable sparse expert models in JAX and Flax."""

__version__ = '0.1.0'

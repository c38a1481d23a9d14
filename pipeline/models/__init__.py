"""Learned models: in comes a ``Batch`` (series around targets with classical estimates), out comes a ``Completed``.

    batch          what a model is given and gives back: dims, units, polarity
    timegate       the gate over time (Oehmcke et al. 2020, Algorithms 1 and 2)
    fusion         the residual U-Net on top of it (equation 4)
    losses         what training minimises
    discriminator  the adversary of the Pix2Pix scheme
    weights        safetensors files with the configuration inside: save, load, hash

Torch begins here; nothing below this floor imports it.
"""

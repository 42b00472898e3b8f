"""Diffusion and flow: one vocabulary for every generative method.

Time ``t`` is 0 at the data and grows towards noise; ``x_t = alpha(t) x0 + sigma(t) eps``. Papers and libraries that run time the
other way, flip the velocity's sign or scale the network's input are translated in adapters, nowhere else.
"""

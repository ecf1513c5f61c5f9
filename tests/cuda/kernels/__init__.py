"""The kernels as the tests see them.

`nvrtc` compiles them, `bars` says what they may use, `launches` says how each is launched, `reference` what it should
give, `checks` compares the two where several tests do.
"""

"""The router's inner loop in C, for where a C compiler is at hand: the same lines, several times as fast.

`detcoll.emulation.lab.line` and `detcoll.emulation.lab.router` are the reference. The C files repeat them function by
function, with every sum in the same order, so both give the same bits; a test holds them against each other. Random
numbers are drawn by the reference's own generators, and the counts go back into the reference's objects, so what
statistics mean is written once.
"""

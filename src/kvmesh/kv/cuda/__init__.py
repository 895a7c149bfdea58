"""The arithmetic of the codecs as torch operations, for workers whose engine computes on a device.

`placement` moves a codec there. The only part of `kvmesh.kv` that imports torch: nothing else imports it but where a
device is asked for. Runs on any torch device; on the CPU, where it is tested, it equals what it stands in for.

Entropy coding stays on the CPU, for a bitstream has four rANS states to a string, which share its words: symbols of a
state follow each other. A chunk of 256 tokens of the default model is one string of 737,280 steps in cachegen, and
strings of 559,872 steps together, at most, in all renditions of transform. As torch operations, which a device starts
no faster than a CPU, a step was measured to take 66 µs for one string and 93 µs for 256 side by side: 49 s a chunk, or
0.27 s if the strings of 256 chunks are there at once, where a core of a CPU takes about 0.03 s. A kernel of one thread
for each string would not save it: the steps remain, each a dependent read of memory. Bitstreams of some thousand
strings would, and each costs 20 bytes. So the CPU's cores take strings apart and put them together, symbols go to and
from the device as bytes, half of what bfloat16 would be, and the stream on which they are worked on is beside the
engine's: while it copies and computes one chunk, other threads decode the next.
"""

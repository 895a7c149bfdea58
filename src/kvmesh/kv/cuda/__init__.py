"""The arithmetic of the codecs as torch operations, for workers whose engine computes on a device.

`placement` moves a codec there; where the device is a CPU, `halves` has it multiply in bfloat16, if it can. The only
part of `kvmesh.kv` that imports torch: nothing else imports it but where a device is asked for. The rest runs on any
torch device; on the CPU, where it is tested, it equals what it stands in for, to the rounding of sums.

Entropy coding stays on the CPU, for a bitstream has four rANS states to a string, which share its words: symbols of a
state follow each other. A chunk of 256 tokens of the default model is one string of 737,280 steps in cachegen, and
strings of 559,872 steps together, at most, in all renditions of transform. As torch operations on one core of a CPU a
step took about 66 µs for one string and 93 µs for 256 side by side: 49 s a chunk, or 0.27 s if strings of 256 chunks
are there at once, where numba's loop takes 0.01 s. A kernel of one thread for each string would not save it: the steps
remain, each a dependent read of memory. Bitstreams of some thousand strings would, and each costs 20 bytes. So the
CPU's cores take strings apart and put them together. Cachegen's symbols go to and from the device as bytes, half of
what bfloat16 would be, and all that is done there is in a stream beside the engine's: while it copies and computes one
chunk, other threads decode the next. Never run on a GPU.
"""

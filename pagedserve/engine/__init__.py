"""The engine: loop, scheduler, blocks. One process, one thread; ids and counters, no tensors."""

"""The machine: BLAS, devices, memory, files, the cache folder, addresses and HTTP."""

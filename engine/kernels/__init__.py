"""Native CPU kernels: how they are found, and the slices that are made of them."""

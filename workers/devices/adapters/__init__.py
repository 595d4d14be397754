"""Which devices this machine has: asked of DXGI and of NVIDIA's library, without loading torch."""

"""What routers share: their input and output, the projection, losses, capacity."""

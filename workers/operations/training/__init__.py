"""What each kind of training job does on the device."""

"""What is sent to the kernel machine, whole files as they lie here; :data:`near.SENT_FILES` names their order."""

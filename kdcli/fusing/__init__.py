"""P4's joint teacher: from cached outputs of frozen teachers to a teacher of its own."""

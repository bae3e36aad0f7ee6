"""``kd demo``: the main job on real images and real ImageNet weights that pip packages ship."""

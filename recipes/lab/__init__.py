"""What runs the papers' recipes: settings to kd commands, commands to results, results beside the printed ones."""

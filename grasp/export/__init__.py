"""Models as files for programs that know nothing of grasp."""

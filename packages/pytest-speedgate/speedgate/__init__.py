"""Guards the speed of any function with pytest: timed in turns with a yardstick, judged by the ratio of both."""

"""Objects, configuration, run directories and errors; imports nothing above itself."""

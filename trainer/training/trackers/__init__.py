"""Where numbers and pictures of a run go besides its folder: a file for each kind of tracker."""

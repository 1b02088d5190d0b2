"""The torch part of each method, named as the method."""

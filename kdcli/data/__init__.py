"""Images: a spec string becomes a map-style data set with stable keys; views of it can be replayed."""

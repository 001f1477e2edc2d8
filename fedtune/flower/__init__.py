"""The only importers of Flower: server app, client app, strategy, in-process grid."""

"""The only importers of Flower: server app, client app, strategy, grids, a site's network."""

from fedtune.flower.bare import use_without_grpc

use_without_grpc()

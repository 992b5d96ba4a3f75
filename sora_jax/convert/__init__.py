"""Convert published weights to parameter trees and back; every tensor that does not fit is an error."""
